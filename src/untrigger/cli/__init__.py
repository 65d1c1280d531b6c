"""What a user types: the commands and their flags."""
