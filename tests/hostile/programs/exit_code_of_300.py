# expect: error
import os
os._exit(300 % 256)
