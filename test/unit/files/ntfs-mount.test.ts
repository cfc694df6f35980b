/** What the scripts that mount an NTFS do with what drivers and tools answer; these are played by functions of the shell. */
import { spawnSync } from 'node:child_process';
import { afterAll, describe, expect, it } from 'vitest';

import { mountText, ntfs3gText, NTFS_LOG_STATUS } from '../../../src/files/environment.js';
import { tempDir } from '../../support/tmp.js';

const dir = tempDir();
afterAll(() => dir.remove());

interface Ran {
  readonly status: number | null;
  /** What was called, in order, and what was said. */
  readonly calls: readonly string[];
  readonly stderr: string;
}

/** Runs `text` with the stubs; each call is a line on stdout. */
function play(stubs: string, text: string): Ran {
  const prelude = `dev=/dev/none; dir=/none/none
said() { echo "$*" >&9; }
${stubs}
(
${text}
) 9>&1`;
  const { status, stdout, stderr } = spawnSync('sh', ['-c', prelude], { encoding: 'utf8' });
  return { status, calls: stdout.split('\n').filter((line) => line !== ''), stderr };
}

describe('ntfs3', () => {
  /** Mounts succeed whose options match the pattern. */
  const withDriver = (pattern: string): Ran =>
    play(
      `mount() { said "mount $*"; case "$*" in ${pattern}) return 0 ;; esac; echo refused >&2; return 32; }
umount() { said "umount $*"; }`,
      mountText('ntfs3'),
    );

  it('replays the log by mounting to write, and is then read only', () => {
    const { status, calls, stderr } = withDriver('*rw,noatime*|*remount,ro*');
    expect(status).toBe(0);
    expect(calls.map((c) => /-o (\S+?)(,noatime.*)? /.exec(c)?.[1])).toEqual(['rw', 'remount,ro']);
    expect(stderr).toBe('');
  });

  it('says that Windows wants a check', () => {
    const { status, stderr } = withDriver('*rw,force*|*remount,ro*');
    expect(status).toBe(0);
    expect(stderr).toContain('b2-note: this NTFS is marked for a check');
  });

  it('shows nothing where the log cannot be replayed', () => {
    const { status, calls } = withDriver('*\\ ro,*');
    expect(status).toBe(NTFS_LOG_STATUS);
    expect(calls.at(-1)).toBe('umount /none/none');
  });

  it('fails as mount does where nothing can be mounted', () => {
    const { status, stderr } = withDriver('none');
    expect([0, NTFS_LOG_STATUS]).not.toContain(status);
    expect(stderr).toContain('refused');
  });
});

describe('ntfs-3g', () => {
  /** Answers of the probe, in order, the word that the last one says, and the status of ntfsrecover. */
  const withTools = (probes: string, recover: number, word = ''): Ran =>
    play(
      `probes='${probes}'`,
      // A function's name cannot have a dot everywhere: the scripts call them through these.
      `probe_it() { said probe; set -- $probes; first=$1; shift; probes=$*; echo "${word}"; return $first; }
recover_it() { said "recover $*"; echo "the log says why"; return ${recover}; }
mount_it() { said "mount $*"; }
info_it() { :; }
${ntfs3gText()
  .replaceAll('ntfs-3g.probe', 'probe_it')
  .replaceAll('ntfsrecover --', 'recover_it --')
  .replaceAll('ntfsinfo --', 'info_it --')
  .replaceAll('ntfs-3g -o', 'mount_it -o')
  .replaceAll('/tmp/', `${dir.path}/`)}`,
    );
  const MOUNTED = 'mount -o ro /dev/none /none/none';
  const RECOVERED = 'recover --kill-fast-restart /dev/none';

  it('mounts what is clean', () => {
    expect(withTools('0', 1)).toMatchObject({ status: 0, calls: ['probe', MOUNTED] });
  });

  it('mounts what was in use when the log is replayed and the probe content', () => {
    const { status, calls } = withTools('15 0', 0);
    expect(status).toBe(0);
    expect(calls).toEqual(['probe', RECOVERED, 'probe', MOUNTED]);
  });

  it('refuses where the log is not replayed, or is as it was', () => {
    expect(withTools('15 15', 1)).toMatchObject({
      status: NTFS_LOG_STATUS,
      calls: ['probe', RECOVERED],
      stderr: 'the log says why\n',
    });
    for (const probes of ['15 15', '14 15', '14 14'])
      expect(withTools(probes, 0).status).toBe(NTFS_LOG_STATUS);
  });

  it('mounts where only a sleeping Windows is left', () => {
    const { status, calls } = withTools('14 14', 0, 'Windows is hibernated, refused to mount.');
    expect(status).toBe(0);
    expect(calls.at(-1)).toBe(MOUNTED);
  });

  it('refuses what is broken, with what the probe said', () => {
    const { status, calls, stderr } = withTools('13', 0, 'NTFS is inconsistent.');
    expect([0, NTFS_LOG_STATUS]).not.toContain(status);
    expect(calls).toEqual(['probe']);
    expect(stderr).toBe('NTFS is inconsistent.\n');
  });
});
