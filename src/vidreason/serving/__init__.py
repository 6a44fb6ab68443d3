"""``vidreason serve``: a finished run as a service that speaks the decision interfaces."""
