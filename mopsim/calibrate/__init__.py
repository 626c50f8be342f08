"""What runs teach: a profile corrected by a user's own runs."""
