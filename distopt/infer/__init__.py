"""What distribution changes in inference."""
