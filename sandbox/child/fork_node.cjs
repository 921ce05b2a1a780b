// The fork server for JavaScript: a node that has started up to its last step before main.js, and is forked there.
//
// As fork_python.py, which explains it; here koffi calls libc. Two things make node forkable: the jail's filter for system
// calls ignores madvise(MADV_DONTFORK), with which V8 keeps its heap from children, and node runs without threads of its
// own (--single-threaded) and gets its event loop made anew in the child (uv_loop_fork). A few threads are nevertheless
// lost in the child, so it must leave before node waits for them.
'use strict'

const stderr = Object.getOwnPropertyDescriptor(process, 'stderr')
Object.defineProperty(process, 'stderr', { configurable: true, value: null }) // who only looks at it, opens it

const fs = require('node:fs')
const { inspect } = require('node:util')
const { queryObjects } = require('node:v8')
const koffi = require('/forkserver/node_modules/koffi')
const { findGenerator } = require('/forkserver/node_random.cjs')

const MESSAGE_BYTES = 1 << 18
const MOST_DESCRIPTORS = 16
const HEADER = 8
const ZERO = '0'.charCodeAt(0)
const GENERATOR_BYTES = 24 // of V8: a seed, which has been used, and two words of state
const REAP_MS = 10
const [REHEARSALS, PIPE_BYTES] = [20, 65536]
const SMALL_MODULE = '/forkserver/node_random.cjs'
const [REPORT, JOB] = [0, 1] // places in a request's descriptors, and, from `base` on, in a child
const [INIT, RESERVED] = [1, 3] // so many from `base` on are the fork server's own: all that come are above

const [PROT_READ, PROT_WRITE, PROT_EXEC] = [1, 2, 4]
const MAPPING = 2 | 0x20 | 0x100000 // private, anonymous, fixed and not in place of another
const [PR_CAPBSET_DROP, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL] = [24, 47, 4]
const SIGKILL = 9
const [EINTR, WNOHANG, MNT_DETACH] = [4, 1, 2]
const [MSG_CMSG_CLOEXEC, POLLIN, POSIX_SPAWN_SETPGROUP] = [0x40000000, 1, 2]
const PIDFD_OPEN = 434
const [O_RDWR, O_PATH, O_CLOEXEC, F_GETFD, F_DUPFD_CLOEXEC] = [2, 0x200000, 0x80000, 1, 1030]

const self = koffi.load(null)
const libc = {}
for (const declaration of [
  'long recvmsg(int, void *, int)', 'int fork()', 'int dup3(int, int, int)', 'int close(int)', 'int kill(int, int)',
  'int pipe(void *)', 'int umount2(str, int)',
  'void *mmap(uintptr_t, size_t, int, int, int, long)', 'int mprotect(uintptr_t, size_t, int)',
  'int prctl(int, unsigned long, unsigned long, unsigned long, unsigned long)', 'int waitpid(int, void *, int)',
  'int poll(void *, unsigned long, int)', 'long syscall(long, long, long, long)',
  'int posix_spawn(void *, str, void *, void *, const char **, const char **)',
  'int posix_spawn_file_actions_init(void *)', 'int posix_spawn_file_actions_destroy(void *)',
  'int posix_spawn_file_actions_addclose(void *, int)', 'int posix_spawn_file_actions_adddup2(void *, int, int)',
  'int posix_spawnattr_init(void *)', 'int posix_spawnattr_setflags(void *, short)', 'void _exit(int)',
  'int memfd_create(str, uint)', 'int open(str, int)', 'int fcntl(int, int, int)', 'void *dlsym(uintptr_t, str)',
  'void *uv_default_loop()', 'int uv_loop_fork(void *)'
]) {
  libc[declaration.match(/(\w+)\(/)[1]] = self.func(declaration)
}
// Node's own interface for embedders, by the names that its compiler gives them
libc.currentIsolate = self.func('_ZN2v87Isolate10GetCurrentEv', 'void *', [])
libc.currentContext = self.func('_ZN2v87Isolate17GetCurrentContextEv', 'void *', ['void *'])
libc.currentEnvironment = self.func('_ZN4node21GetCurrentEnvironmentEN2v85LocalINS0_7ContextEEE', 'void *', ['void *'])
libc.atExit = self.func('_ZN4node6AtExitEPNS_11EnvironmentEPFvPvES2_', 'void', ['void *', 'void *', 'uintptr_t'])

/** A function of libc; throws what it says has failed. */
function call (name, ...values) {
  const answer = libc[name](...values)
  if (answer === -1) throw new Error(`${name} failed with error ${koffi.errno()}`)
  return answer
}

const kept = []

/** Memory with an address that stays: V8 moves small arrays about, and frees what it thinks nobody needs. */
function steady (bytes) {
  kept.push(Buffer.alloc(Math.max(bytes, 1024)))
  return kept.at(-1)
}

/**
 * Forks a child for every request. Returns in the child that is to be the program, and nowhere else. `place` is what the
 * child will call next.
 */
function serve (fs, place) {
  const { base, perform, startFirst, image, receive } = begin(place)
  const ends = new Ends()
  for (;;) {
    ends.reportedUntilRequest()
    const { lists, descriptors } = receive()
    if (Math.min(...descriptors) < base + RESERVED) throw new Error(`descriptors came at ${descriptors}`)
    const report = descriptors[REPORT]
    let [init, program] = [0, -1]
    try {
      perform('before', lists.before)
      init = startFirst(report)
      program = call('fork')
      if (program === 0) {
        perform('child', lists.child)
        call('uv_loop_fork', libc.uv_default_loop())
        perform('wait', lists.wait)
        return { report: base + REPORT, job: taken(image, lists.room, base + JOB) }
      }
    } catch (failure) {
      try { fs.writeSync(program === 0 ? base + REPORT : report, `failed: ${failure.message}`) } catch {} // nobody listens
      if (program === 0) libc._exit(1)
      if (init) ends.end(init)
    }
    perform('after', lists.after)
    if (program > 0) ends.watch(program, init, report)
    else libc.close(report)
  }
}

/** The job, of which the size in digits is at `room`: nothing, if none is wanted any more. */
function taken (image, room, job) {
  let size = 0
  while (image[room] !== 0) size = 10 * size + image[room++] - ZERO
  let text = image.subarray(image.length / 2)
  if (size > text.length) fs.readSync(job, text = Buffer.alloc(size), 0, size, 0)
  libc.close(job)
  return text.subarray(0, size)
}

function begin (place) {
  const message = Buffer.alloc(MESSAGE_BYTES)
  const setup = JSON.parse(message.toString('utf8', 0, fs.readSync(0, message)))
  part(setup.shared_at, setup.size, setup.shared)
  const perform = performer(setup)
  const generator = findGenerator(BigInt(koffi.address(libc.currentIsolate())))
  rehearse(place)
  for (let capability = 0; libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) === 0;) capability++
  call('prctl', PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) // a program that is started has no rights
  const { base, inherited } = reserve(Buffer.from(setup.first_process, 'hex'))
  const image = part(setup.request_at, setup.size)
  const receive = receiver(image)
  const startFirst = firstProcesses(base)
  becomeProgram()
  call('umount2', '/forkserver', MNT_DETACH) // for all children at once: the kernel waits for all processors each time
  fs.writeSync(0, ['ready', base, generator, GENERATOR_BYTES, ...inherited].join(' '))
  return { base, perform, startFirst, image, receive }
}

/** Memory at an address that the server has chosen. */
function part (address, size, hex = '') {
  const memory = libc.mmap(address, size, PROT_READ | PROT_WRITE, MAPPING, -1, 0)
  if (Number(koffi.address(memory)) !== address) throw new Error(`${address} is taken: error ${koffi.errno()}`)
  const view = Buffer.from(koffi.view(memory, size))
  view.write(hex, 'hex')
  return view
}

/** A function that makes the system calls of a list: it is given the list's name, for its error, and its place. */
function performer ({ code_at: codeAt, request_at: requestAt, size, code }) {
  part(codeAt, size, code)
  call('mprotect', codeAt, size, PROT_READ | PROT_EXEC)
  const make = koffi.decode(BigInt(codeAt), koffi.proto('long makeCalls(uintptr_t)'))
  return (name, place) => {
    const failure = make(requestAt + 4 * place)
    if (failure !== 0) throw new Error(`${name} ${failure}`)
  }
}

/** Puts what is needed for ever behind what libuv and node have open, where no request's descriptors will be. */
function reserve (firstProcess) {
  const inherited = fs.readdirSync('/proc/self/fd').map(Number).filter((number) => number > 2 && isOpen(number))
  const base = Math.max(2, ...inherited) + 1
  const file = call('memfd_create', 'init', 1) // MFD_CLOEXEC
  fs.writeSync(file, firstProcess)
  const opened = [
    call('open', '/proc/self/ns/pid', O_CLOEXEC),
    call('open', `/proc/self/fd/${file}`, O_PATH | O_CLOEXEC),
    call('open', '/dev/null', O_RDWR | O_CLOEXEC)
  ]
  fs.fchmodSync(file, 0o111) // nobody may read it: so no process can look into one that runs it
  const aside = opened.map((number) => call('fcntl', number, F_DUPFD_CLOEXEC, base + 2 * opened.length))
  for (const number of [file, ...opened]) libc.close(number) // what is open for writing cannot be executed
  aside.forEach((number, place) => call('dup3', number, base + place, O_CLOEXEC))
  for (const number of aside) libc.close(number)
  while (call('open', '/dev/null', O_CLOEXEC) < base); // fills what is free below, where descriptors would be let in
  libc.close(base + aside.length)
  return { base, inherited }
}

/** Whether it is: the descriptor that the list of them was read from is not any more. */
function isOpen (number) {
  return libc.fcntl(number, F_GETFD, 0) !== -1
}

/** A function that starts a pid namespace's first process, as the leader of a process group. */
function firstProcesses (base) {
  const [attributes, actions, pid] = [steady(512), steady(512), steady(4)]
  libc.posix_spawnattr_init(attributes)
  libc.posix_spawnattr_setflags(attributes, POSIX_SPAWN_SETPGROUP) // and the group is a new one, unless told otherwise
  return (report) => {
    libc.posix_spawn_file_actions_init(actions)
    for (const number of [0, 1, 2]) libc.posix_spawn_file_actions_addclose(actions, number)
    libc.posix_spawn_file_actions_adddup2(actions, report, 3)
    const error = libc.posix_spawn(pid, `/proc/self/fd/${base + INIT}`, actions, attributes, ['init', null], [null])
    libc.posix_spawn_file_actions_destroy(actions)
    if (error !== 0) throw new Error(`posix_spawn failed with error ${error}`)
    return pid.readInt32LE(0)
  }
}

/** The programs that were forked and have not ended, and the first processes that were told to. */
class Ends {
  #living = new Map()
  #dying = []

  /** When `pid` has ended, so will its `init`, and `report`, which is taken over, is told. */
  watch (pid, init, report) {
    this.#living.set(call('syscall', PIDFD_OPEN, pid, 0, 0), { pid, init, report })
  }

  /** Ends a first process, and the kernel with it all others of its pid namespace. */
  end (init) {
    call('kill', init, SIGKILL)
    this.#dying.push(init)
  }

  /** Hears of ends until there is something to read from the server. */
  reportedUntilRequest () {
    for (;;) {
      this.#dying = this.#dying.filter((init) => libc.waitpid(init, null, WNOHANG) === 0)
      const descriptors = [...this.#living.keys(), 0]
      const set = Buffer.alloc(8 * descriptors.length) // of struct pollfd
      descriptors.forEach((descriptor, place) => {
        set.writeInt32LE(descriptor, 8 * place)
        set.writeInt16LE(POLLIN, 8 * place + 4)
      })
      const count = libc.poll(set, descriptors.length, this.#dying.length > 0 ? REAP_MS : -1)
      if (count <= 0) continue // a signal came, or nothing did
      const ready = descriptors.filter((_, place) => set.readInt16LE(8 * place + 6) !== 0)
      for (const pidfd of ready) if (pidfd !== 0) this.#ended(pidfd)
      if (ready.length === 1 && ready[0] === 0) return
    }
  }

  #ended (pidfd) {
    const { pid, init, report } = this.#living.get(pidfd)
    this.#living.delete(pidfd)
    libc.close(pidfd)
    const status = Buffer.alloc(4)
    call('waitpid', pid, status, 0)
    const ended = `ended ${process.hrtime.bigint()} ${status.readInt32LE(0)}`
    this.end(init)
    try { fs.writeSync(report, ended) } catch {} // the server does not listen any more
    libc.close(report)
  }
}

/**
 * Does what nearly every program does, so that it need not be loaded and compiled in each child; and does it so often that
 * V8 compiles it better here, not in each child.
 */
function rehearse (place) {
  const { Console } = require('node:console')
  const { Socket } = require('node:net')
  const job = Buffer.from(JSON.stringify({ args: [], files: { '/dev/null': 'text' } }))
  const [end, other] = pipe()
  const socket = new Socket({ fd: other, readable: false, writable: true }) // as process.stdout is, when it is a pipe
  const console = new Console(socket)
  for (let count = 0; count < REHEARSALS; count++) {
    place(fs, job, 'r+')
    delete require.cache[SMALL_MODULE]
    require(SMALL_MODULE)
    console.log('text')
    console.log('%s', 1, { a: ['b', 2n, null] }, new Map([[1, new Error('rehearsal')]]))
    process._tickCallback()
    fs.readSync(end, Buffer.alloc(PIPE_BYTES), 0, PIPE_BYTES, null)
  }
  delete require.cache[SMALL_MODULE]
  socket.unref()
  socket._handle.close() // which leaves the program nothing to do, as socket.destroy() would
  fs.closeSync(end)
  const { emitWarning } = process
  process.emitWarning = () => {} // it is experimental, we know
  queryObjects(class None {}) // collects garbage first; gc() of a new context would choose the seed of all later ones
  process.emitWarning = emitWarning
  process._tickCallback() // what is still to be done is not the program's
  Object.defineProperty(process, 'stderr', stderr)
}

/** The ends of a new pipe, to read from and to write to. */
function pipe () {
  const ends = Buffer.alloc(8)
  call('pipe', ends)
  return [ends.readInt32LE(0), ends.readInt32LE(4)]
}

/** A function that waits for the next request, which is put into `image`: its lists, and the descriptors with it. */
function receiver (image) {
  const controlBytes = 16 + 4 * MOST_DESCRIPTORS
  const [vector, header, control] = [steady(16), steady(56), steady(controlBytes)] // struct iovec, struct msghdr
  const numbers = new Int32Array(image.buffer)
  vector.writeBigUInt64LE(BigInt(koffi.address(image)), 0)
  vector.writeBigUInt64LE(BigInt(image.length), 8)
  header.writeBigUInt64LE(BigInt(koffi.address(vector)), 16)
  header.writeBigUInt64LE(1n, 24)
  header.writeBigUInt64LE(BigInt(koffi.address(control)), 32)
  return () => {
    let length
    do {
      header.writeBigUInt64LE(BigInt(controlBytes), 40)
      length = libc.recvmsg(0, header, MSG_CMSG_CLOEXEC)
    } while (length === -1 && koffi.errno() === EINTR)
    if (length <= 0) libc._exit(0) // the server is gone
    const descriptors = []
    const end = Number(control.readBigUInt64LE(0))
    for (let place = 16; place < end; place += 4) descriptors.push(control.readInt32LE(place))
    const [before, child, wait, after, room, , , patches] = numbers
    for (let place = HEADER; place < HEADER + 2 * patches; place += 2) {
      numbers[numbers[place]] = descriptors[numbers[place + 1]]
    }
    return { lists: { before, child, wait, after, room }, descriptors }
  }
}

/** Becomes, but for the fork, a node like one that has just been started. */
function becomeProgram () {
  Object.defineProperty(process, 'pid', { ...Object.getOwnPropertyDescriptor(process, 'pid'), value: 2 })
  // Its parent is outside of its pid namespace. With 0 for it, a signal would reach one's own process group.
  Object.defineProperty(process, 'ppid', { ...Object.getOwnPropertyDescriptor(process, 'ppid'), value: 1 })
  leaveEarly()
}

/**
 * Ends the process when its program is through: node itself would wait for threads that did not survive the fork. Where
 * node has something to print after 'exit' was emitted (an error that nobody caught; an await that nothing settles), it
 * goes on, and ends where embedders are told that it does.
 */
function leaveEarly () {
  const UNSETTLED_AWAIT = 13
  const environment = libc.currentEnvironment(libc.currentContext(libc.currentIsolate()))
  const exit = libc.dlsym(0, '_exit')
  process.reallyExit = (code) => libc._exit(Number(code ?? 0))
  const { emit } = process
  let uncaught = false
  process.emit = function (event, ...values) {
    if (event === 'uncaughtException') {
      const handled = failing(() => Reflect.apply(emit, this, [event, ...values]))
      uncaught = !handled
      return handled
    }
    if (event !== 'exit' || !process._exiting) return Reflect.apply(emit, this, [event, ...values])
    let code = 1
    try {
      const handled = Reflect.apply(emit, this, [event, ...values])
      code = process.exitCode ?? values[0] ?? 0
      if (!uncaught && code !== UNSETTLED_AWAIT) libc._exit(code)
      return handled
    } finally {
      libc.atExit(environment, exit, code)
    }
  }
  process.emit('rehearsal') // compiles it
}

/** What a handler of uncaught errors gives; if it throws itself, node ends there with a code of its own. */
function failing (handle) {
  const HANDLER_FAILED = 7
  try {
    return handle()
  } catch (error) {
    fs.writeSync(2, `${inspect(error)}\n\nNode.js ${process.version}\n`)
    return libc._exit(HANDLER_FAILED)
  }
}

module.exports = { serve }
