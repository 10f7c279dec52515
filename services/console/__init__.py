"""The console: server-rendered pages where people see the formulary, and act in it as themselves."""
