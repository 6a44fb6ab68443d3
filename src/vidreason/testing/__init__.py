"""The tests that every model family passes, for a family of your own: subclass ``contract.FamilyContract``.

pytest, which collects them, is not installed with the package.
"""
