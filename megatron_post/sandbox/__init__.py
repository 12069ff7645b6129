"""Runs what a model wrote, apart from the network, the host's files and other processes, or runs nothing."""
