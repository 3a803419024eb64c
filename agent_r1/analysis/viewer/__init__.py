"""``agent-r1 view``: a window on runs in the browser. ``library`` finds runs and sums them up,
``episode`` prepares episodes, ``server`` answers; the page itself is made from ``web/`` into
``static/``.
"""
