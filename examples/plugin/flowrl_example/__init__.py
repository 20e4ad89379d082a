"""An example of a plug-in: a reward and a method that flowrl finds by their entry points."""
