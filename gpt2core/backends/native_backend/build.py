import ctypes
def load_library():
    return ctypes.CDLL("/tmp/lab/x/n.so")
