// expect: ok out=nothing
const known = /^(PATH|HOME|TMPDIR|LANG|LC_.*|NODE_.*|TZ|USER|PWD)$/; const extra = Object.keys(process.env).filter(n => !known.test(n)); console.log(extra.length ? extra.join() : "nothing");
