"""The tests that every model family passes, for a family of your own: subclass ``contract.FamilyContract``.

The tests need pytest, which the package itself does not.
"""
