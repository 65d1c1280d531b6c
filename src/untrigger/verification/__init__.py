"""Whether a finished model hides a backdoor."""
