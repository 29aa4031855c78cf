"""What a step costs: FLOPs, memory, the machines it may run on."""
