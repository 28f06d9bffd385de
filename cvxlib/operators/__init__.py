r"""Operators: the linear maps of a program, two by two, and the projections onto their graphs.

Across: whether the design tensor :math:`T_{i,g}` is formed, or only contracted with weights. Down: what a map is given.

.. code-block:: text

                     design tensor formed         only contracted
                   +----------------------------+----------------------------------+
    lifted blocks  | lifted.LiftedOperator, of  | maps.CoreMap: blocks in the      |
    Z              | maps.DesignMap, MaskedMap  | bases of some factors            |
                   +----------------------------+----------------------------------+
    factors        | factored.FactoredOperator, | factored.FactoredOperator, over  |
    u, V           | over contractions.Design   | GramMatrices, MeanQueries, or    |
                   |                            | hidden.HiddenMatrices            |
                   +----------------------------+----------------------------------+

``projections`` are onto the graphs :math:`\{(AZ, Z)\}` of the maps of the first row. May import the model and what is below it.
"""
