"""Shared parts of the recipes for code, such as tests of programs, mutants and similarity of programs."""
