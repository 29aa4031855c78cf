"""The mini scale's data: generated scenes."""
