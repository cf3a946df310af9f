"""Three ways of answering many prompts at once, and what each costs.

`decompose` makes parallel calls of one prompt. `pack` makes one prompt of several questions of one client. `batch` puts
the requests of all clients into one pass of the model, each in a prompt of its own. `accounts` has the formulas.
"""
