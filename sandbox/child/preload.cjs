// What every node that is started ahead of its job loads first (--require). Workers load it again: then it does nothing.
'use strict'

const { isMainThread } = require('node:worker_threads')

if (isMainThread) {
  const fs = require('node:fs')
  const ahead = process.env.FORK_SERVER ? require('/forkserver/fork_node.cjs').serve : announce
  delete process.env.FORK_SERVER
  process.execArgv.length = 0
  for (const path of Object.keys(require.cache)) delete require.cache[path]
  module.children.length = 0
  const { report, job, size } = ahead(fs, place)
  if (size === 0) process.reallyExit(0) // not wanted any more
  try {
    const text = Buffer.alloc(size)
    fs.readSync(job, text, 0, size, 0)
    fs.closeSync(job)
    place(fs, text)
  } catch (failure) { // its files cannot be written
    fs.writeSync(report, `failed: ${failure.message}`)
    process.reallyExit(1)
  }
  fs.writeSync(report, `started ${process.hrtime.bigint()}`)
  fs.closeSync(report)
}

/** Waits for the size of a job, with the descriptors where fork_python.py leaves them. */
function announce (fs) {
  const [report, job, digits] = [3, 4, Buffer.alloc(24)]
  fs.writeSync(report, 'ready')
  return { report, job, size: Number(digits.toString('latin1', 0, fs.readSync(report, digits))) }
}

/** Writes the job's files and leaves node as it is when it is about to run main.js. */
function place (fs, text, flag = 'wx') {
  const { args, files } = JSON.parse(text.toString())
  for (const [name, content] of Object.entries(files)) {
    const folder = name.slice(0, Math.max(0, name.lastIndexOf('/')))
    if (folder) fs.mkdirSync(folder, { recursive: true })
    fs.writeFileSync(name, content, { flag })
  }
  process.argv.push(...args)
}
