"""What the programs find of this extension; the rest is in ``a1111_extension``, reached while its root is on the path.

They run this file at every start and at every "Reload UI", and take each script class that they see in it.
"""

from a1111_extension import start

Panel = start.register()

__all__ = ["Panel"]
