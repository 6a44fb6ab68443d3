from user_folder import here, project

__all__ = ["here", "project"]
