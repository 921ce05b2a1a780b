// What every node that is started ahead of its job loads first (--require). Workers load it again: then it does nothing.
'use strict'

const { isMainThread } = require('node:worker_threads')

if (isMainThread) {
  const fs = require('node:fs')
  let ready
  if (process.env.FORK_SERVER) {
    delete process.env.FORK_SERVER
    ready = require('/forkserver/fork_node.cjs').serve()
  } else {
    ready = { report: 3, job: 4, size: awaited(fs, 3) } // as fork_python.py leaves them
  }
  if (ready.size === 0) process.reallyExit(0) // not wanted any more
  try {
    takeJob(fs, ready)
  } catch (failure) { // its files cannot be written
    fs.writeSync(ready.report, `failed: ${failure.message}`)
    process.reallyExit(1)
  }
  process.execArgv.length = 0
  for (const path of Object.keys(require.cache)) delete require.cache[path]
  module.children.length = 0
  fs.writeSync(ready.report, `started ${process.hrtime.bigint()}`)
  fs.closeSync(ready.report)
}

/** Waits for the job; its size is 0 if there will be none. */
function awaited (fs, report) {
  const digits = Buffer.alloc(24)
  fs.writeSync(report, 'ready')
  return Number(digits.toString('latin1', 0, fs.readSync(report, digits)))
}

/** Writes the job's files and leaves node as it is when it is about to run main.js. */
function takeJob (fs, { job, size }) {
  const text = Buffer.alloc(size)
  fs.readSync(job, text, 0, text.length, 0)
  fs.closeSync(job)
  const { args, files } = JSON.parse(text.toString())
  for (const [name, content] of Object.entries(files)) {
    const folder = name.replace(/\/?[^/]*$/, '')
    if (folder) fs.mkdirSync(folder, { recursive: true })
    fs.writeFileSync(name, content, { flag: 'wx' })
  }
  process.argv.push(...args)
}
