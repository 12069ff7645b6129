"""What the recipes for code share: programs in replies, tests of programs, mutants, and how alike two are."""
