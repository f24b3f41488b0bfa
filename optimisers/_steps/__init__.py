"""Steps: what a formula may say, and the steps of users as machine code."""
