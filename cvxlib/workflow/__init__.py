"""The workflow: what a user does with solves.

The regularisation path and its points on disk, estimators with scikit-learn's manners, saving and loading, figures. May import everything
but the testing batteries and the applications.
"""
