"""What one worker can say to the others."""
