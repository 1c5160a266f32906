"""What the command line offers: each function's parameters are its flags, its docstring is its help. Imports of the library wait until a command runs."""
