// What every node that is started ahead of its job loads first (--require), and its workers too.
'use strict'

const { isMainThread } = require('node:worker_threads')

if (isMainThread) {
  const fs = require('node:fs')
  const ahead = process.env.FORK_SERVER ? require('/forkserver/fork_node.cjs').serve : announce
  delete process.env.FORK_SERVER
  process.execArgv.length = 0
  for (const path of Object.keys(require.cache)) delete require.cache[path]
  module.children.length = 0
  const { report, job } = ahead(fs, place)
  if (job.length === 0) process.reallyExit(0) // not wanted any more
  try {
    place(fs, job)
  } catch (failure) { // its files cannot be written
    fs.writeSync(report, `failed: ${failure.message}`)
    process.reallyExit(1)
  }
  fs.writeSync(report, `started ${process.hrtime.bigint()}`)
  fs.closeSync(report)
} else if (process.ppid === 0) { // as fork_node.cjs has it in the main thread
  Object.defineProperty(process, 'ppid', { ...Object.getOwnPropertyDescriptor(process, 'ppid'), value: 1 })
}

/** Waits for a job, with the descriptors where fork_python.py leaves them. */
function announce (fs) {
  const [report, file, digits] = [3, 4, Buffer.alloc(24)]
  fs.writeSync(report, 'ready')
  const job = Buffer.alloc(Number(digits.toString('latin1', 0, fs.readSync(report, digits))))
  fs.readSync(file, job, 0, job.length, 0)
  fs.closeSync(file)
  return { report, job }
}

/** Writes the job's files and leaves node as it is when it is about to run main.js. */
function place (fs, job, flag = 'wx') {
  const { args, files } = JSON.parse(job.toString())
  for (const [name, content] of Object.entries(files)) {
    const folder = name.slice(0, Math.max(0, name.lastIndexOf('/')))
    if (folder) fs.mkdirSync(folder, { recursive: true })
    fs.writeFileSync(name, content, { flag })
  }
  process.argv.push(...args)
}
