"""The rooms behind the command `hw3gpu`: one for each of its subcommands, and the measure of numerical error."""
