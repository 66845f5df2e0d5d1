"""What one training sample is, per objective."""
