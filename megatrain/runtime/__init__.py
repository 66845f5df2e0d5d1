"""The running job: launch environment, metrics, guards."""
