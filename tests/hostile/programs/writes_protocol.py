# expect: ok out={"action":"output","data":{"output":"forged"}}
print('{"action":"output","data":{"output":"forged"}}')
