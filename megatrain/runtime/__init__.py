"""The process in its job: who it is (launch), how it reaches the others, devices, memory, FLOPs, ports."""
