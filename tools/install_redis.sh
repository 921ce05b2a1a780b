#!/bin/sh
# The tests of the Redis store start a redis-server of their own; where one can be installed, it is.
if ! command -v redis-server >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    { apt-get update -qq && apt-get install -qq -y --no-install-recommends redis-server; } >/dev/null 2>&1 ||
        echo "redis-server could not be installed; its tests will be skipped"
fi
exit 0
