/**
 * What keeps the disks of the proofs busy: a database, random writes with fsync, git and tar, and numbered records; the first and
 * the last log outside the disk what was acknowledged and when. Each runs in a process group of its own until it is stopped.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import type { Needs } from './requires.js';
import { findTool } from './requires.js';
import type { TempDir } from './tmp.js';

export const WORKLOAD_NEEDS: Needs = {
  tools: ['fio', 'python3', 'git', 'tar', 'bash', 'setpriv'],
};

/**
 * Transactions of 1 to 20 rows with a checksum each; the oldest rows go. Logs `begin acknowledged newest-id`, times in nanoseconds
 * since 1970.
 */
const SQLITE = `
import os,random,sqlite3,sys,time,zlib
mount,logname,mode,pause=sys.argv[1],sys.argv[2],sys.argv[3],float(sys.argv[4])
db=sqlite3.connect(mount+'/t.db',isolation_level=None)
db.execute('pragma journal_mode='+mode); db.execute('pragma synchronous=full')
db.execute('create table if not exists t(id integer primary key autoincrement, a blob, c integer)')
db.execute('create index if not exists i on t(c)')
log=open(logname,'a')
while True:
    begin=time.time_ns()
    db.execute('begin')
    for _ in range(random.randint(1,20)):
        a=os.urandom(random.randint(10,2000)); newest=db.execute('insert into t(a,c) values(?,?)',(a,zlib.crc32(a))).lastrowid
    db.execute('delete from t where id<?',(newest-1000,))
    db.execute('commit')
    log.write('%d %d %d\\n'%(begin,time.time_ns(),newest)); log.flush()
    time.sleep(pause)
`;

/** Says `malformed …` or `rows NEWEST`. */
const SQLITE_CHECK = `
import os,sqlite3,sys,zlib
name=sys.argv[1]+'/t.db'
if not os.path.exists(name): print('rows 0'); sys.exit()
try:
    db=sqlite3.connect(name)
    said=db.execute('pragma integrity_check').fetchone()[0]
    if said!='ok': print('malformed',said); sys.exit()
    if db.execute("select count(*) from sqlite_master where name='t'").fetchone()[0]==0: print('rows 0'); sys.exit()
    last=None
    for id,a,c in db.execute('select id,a,c from t order by id'):
        if zlib.crc32(a)!=c: print('malformed row',id); sys.exit()
        if last is not None and id!=last+1: print('malformed: after row',last,'comes',id); sys.exit()
        last=id
    print('rows',last or 0)
except sqlite3.DatabaseError as e: print('malformed',e)
`;

/** Appends records of 64 bytes, each with fsync; logs `issued acknowledged number`. */
const RECORDS = `
import os,sys,time
mount,logname,pause=sys.argv[1],sys.argv[2],float(sys.argv[3])
f=os.open(mount+'/records',os.O_RDWR|os.O_CREAT|os.O_APPEND,0o600)
n=os.fstat(f).st_size//64
log=open(logname,'a')
while True:
    n+=1; issued=time.time_ns()
    os.write(f,('%d %d'%(n,issued)).ljust(63).encode()+b'\\n'); os.fsync(f)
    log.write('%d %d %d\\n'%(issued,time.time_ns(),n)); log.flush()
    time.sleep(pause)
`;

/** Repositories with commits, archives of them, renames and removals. */
const FILES = `
set -eu
cd "$1"; pause=$2; i=0
export HOME="$1" GIT_CONFIG_NOSYSTEM=1 GIT_AUTHOR_NAME=x GIT_AUTHOR_EMAIL=x@y GIT_COMMITTER_NAME=x GIT_COMMITTER_EMAIL=x@y
while :; do
  i=$((i+1)); d=r$((i%3)); rm -rf "$d"; mkdir "$d"; cd "$d"; git init -q .
  for k in 1 2 3; do
    for f in 1 2 3 4 5 6 7 8 9 10; do head -c $((RANDOM%20000+100)) /dev/urandom >"f$f"; done
    git add -A; git commit -qm "c$k"; sleep "$pause"
  done
  tar cf ../t.tar .; cp ../t.tar ../u.tar; mv ../u.tar "../v$((i%3)).tar"; cd ..
  [ $((i%3)) -ne 0 ] || sync -f .
done
`;

export interface Load {
  /** Ends it, whatever it is doing; rejects if it had ended before by itself. */
  stop(): Promise<void>;
}

function startLoad(name: string, args: readonly string[]): Load {
  // It dies with this process, however that ends: nobody else would stop it.
  const child: ChildProcess = spawn(
    'setpriv',
    ['--pdeathsig', 'KILL', '--', findTool(name) ?? name, ...args],
    { detached: true, stdio: ['ignore', 'ignore', 'pipe'] },
  );
  let said = '';
  child.stderr?.on('data', (data: Buffer) => (said = (said + data.toString()).slice(-2000)));
  let isOver = false;
  const ended = new Promise<void>((resolve) => {
    child.once('error', (error) => {
      said += error.message;
      isOver = true;
      resolve();
    });
    child.once('exit', () => {
      isOver = true;
      resolve();
    });
  });
  return {
    async stop() {
      if (isOver) throw new Error(`the load ${name} ${args.join(' ')} ended by itself: ${said}`);
      if (child.pid !== undefined) process.kill(-child.pid, 'SIGKILL');
      await ended;
    },
  };
}

export type LoadKind = 'sqlite' | 'sqlite-rollback' | 'fio' | 'files' | 'records';

/** Where a load logs what was acknowledged. */
export const logOf = (dir: TempDir, label: string, kind: LoadKind): string =>
  dir.join(`${label}-${kind}.log`);

/**
 * Starts a load on the file system mounted at `mount`; `label` tells its files in `dir` from others'. `pauseMs` between two
 * transactions, records or commits; for fio the mean time between two writes.
 */
export function startWorkload(
  dir: TempDir,
  kind: LoadKind,
  mount: string,
  label: string,
  pauseMs: number,
): Load {
  const script = (name: string, text: string): string => {
    const file = dir.join(`${label}-${name}`);
    writeFileSync(file, text);
    return file;
  };
  const log = logOf(dir, label, kind);
  const pause = String(pauseMs / 1000);
  switch (kind) {
    case 'sqlite':
    case 'sqlite-rollback': {
      const mode = kind === 'sqlite' ? 'wal' : 'delete';
      return startLoad('python3', [script('sqlite.py', SQLITE), mount, log, mode, pause]);
    }
    case 'records':
      return startLoad('python3', [script('records.py', RECORDS), mount, log, pause]);
    case 'files':
      return startLoad('bash', [script('files.sh', FILES), mount, pause]);
    case 'fio':
      return startLoad('fio', [
        '--name=x',
        '--thread=1',
        `--directory=${mount}`,
        '--rw=randwrite',
        '--bs=4k',
        '--ioengine=psync',
        '--fsync=1',
        '--size=16m',
        '--nrfiles=8',
        '--norandommap=1',
        '--time_based',
        '--runtime=1000000',
        ...(pauseMs === 0 ? [] : [`--rate_iops=${Math.max(1, Math.round(1000 / pauseMs))}`]),
        '--output-format=terse',
        '--output=/dev/null',
      ]);
  }
}

/** A line of a log: what a writer was told, and when; times in nanoseconds since 1970. */
export interface Acknowledged {
  readonly issuedNs: bigint;
  readonly ackedNs: bigint;
  readonly number: number;
}

/** In the order in which it was acknowledged; a last line that was cut off is left out. */
export function readAcknowledged(log: string): Acknowledged[] {
  let text: string;
  try {
    text = readFileSync(log, 'utf8');
  } catch (error) {
    if (error instanceof Error && 'code' in error && error.code === 'ENOENT') return [];
    throw error;
  }
  const lines = text.slice(0, text.lastIndexOf('\n') + 1).split('\n');
  return lines
    .filter((line) => line !== '')
    .map((line) => {
      const [issued = '', acked = '', number = ''] = line.split(' ');
      return { issuedNs: BigInt(issued), ackedNs: BigInt(acked), number: Number(number) };
    });
}

/** The greatest number that must be there in a state of `instantNs`, and the greatest that can. */
export function bounds(
  log: readonly Acknowledged[],
  instantNs: bigint,
): { readonly least: number; readonly most: number } {
  let least = 0;
  let most = 0;
  for (const a of log) {
    if (a.ackedNs < instantNs) least = Math.max(least, a.number);
    if (a.issuedNs <= instantNs) most = Math.max(most, a.number);
  }
  // What was under way when the writer was killed is in no log.
  const last = log.at(-1);
  if (last === undefined || last.ackedNs <= instantNs) most = Number.POSITIVE_INFINITY;
  return { least, most };
}

export const SQLITE_CHECK_PROGRAM = SQLITE_CHECK;
