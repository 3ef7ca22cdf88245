"""How good it is: metrics over a whole split, comparable by their protocol, and pictures."""
