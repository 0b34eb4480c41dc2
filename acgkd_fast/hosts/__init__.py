"""Shims for other people's data-free code bases; ``docs/hosts.md`` shows the changed lines of each.

Written from the hosts' interfaces and formulas. Nothing is imported until it is asked for.
"""
