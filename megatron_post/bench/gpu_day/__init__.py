"""Half an hour of one NVIDIA GPU, see `day`. Its files import nothing but the standard library at first."""
