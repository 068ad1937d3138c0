"""placeholder"""
class Alignment:
    build=None
def templated(*a): ...
