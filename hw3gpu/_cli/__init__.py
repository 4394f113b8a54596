"""The command `hw3gpu`: a module for each of its subcommands, and the measure of numerical error."""
