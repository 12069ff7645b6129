"""Runs programs that a model wrote, without access to the network, the host's files and other processes."""
