"""The tests that every model family passes, for a family of your own: subclass ``contract.FamilyContract``.

It imports pytest, which is not installed with the package.
"""
