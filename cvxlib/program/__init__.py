"""The program: a convex program, what is known of its optimum, and the way back to weights.

``certificate`` holds the interval, the factors and the status; ``program`` the primal and the dual; ``solution`` what a solver returns;
``recovery`` turns lifted matrices into factors. May import the operators and what is below them.
"""
