"""Tools that models call, and the trajectories of their calls."""
