"""The search for every method's settings, on validation splits only."""
