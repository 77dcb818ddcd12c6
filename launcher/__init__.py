"""The command that runs a recipe: its checks, its stages one after another, its dry run and its report."""
