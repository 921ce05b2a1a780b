# expect: error
raise SystemExit(255)
