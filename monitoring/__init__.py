"""What is recorded of each prediction, and what it is compared with."""
