"""What a model promises, how it runs, and which version is trusted where."""
