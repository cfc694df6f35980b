/** What devices have in common, of disks that LVM, MD and btrfs themselves have made. */
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, expect, it } from 'vitest';

import { carriedOn } from '../../../src/commands/run/watch-shared.js';
import { runTool, sparseFile } from '../../support/loop.js';
import { requires } from '../../support/requires.js';
import { tempDir, type TempDir } from '../../support/tmp.js';

const fixture = (path: string): string =>
  fileURLToPath(new URL(`../../fixtures/${path}`, import.meta.url));
const MIB = 1024 * 1024;
const bare = (uuid?: string): string | undefined => uuid?.replaceAll(':', '');

requires({ tools: ['tar', 'gzip', 'mkfs.btrfs', 'mkfs.ext4'] }).describe('carriedBy', () => {
  let dir: TempDir;

  beforeAll(async () => {
    dir = tempDir();
    await runTool('tar', '-C', dir.path, '-xSzf', fixture('lvm-two-disks/disks.tar.gz'));
    await runTool('tar', '-C', dir.path, '-xSzf', fixture('md/members.tar.gz'));
  });
  afterAll(() => dir.remove());

  it('knows a volume group in a partition of one disk and on the whole of another', async () => {
    const [a, b] = await Promise.all([carriedOn(dir.join('a')), carriedOn(dir.join('b'))]);
    expect(a.map(({ parts: _, ...same }) => same)).toEqual(b.map(({ parts: _, ...same }) => same));
    // Each has a physical volume of its own.
    const pv = { id: expect.stringMatching(/^[0-9a-z]{32}$/) };
    expect(b).toEqual([expect.objectContaining({ parts: [pv] })]);
    expect(b[0]?.parts).not.toEqual(a[0]?.parts);
    expect(a).toEqual([
      {
        parts: [pv],
        key: expect.stringMatching(/^lvm [0-9a-z]{32}$/),
        what: 'volume group twovg',
        name: 'twovg',
      },
    ]);
  });

  it('knows members of an array by the name of the array, whatever it is called, and the LVM in it', async () => {
    const [first, second] = await Promise.all(
      ['resync-first', 'resync-second'].map((name) => carriedOn(dir.join(name))),
    );
    expect(first?.map((c) => [c.key, c.parts])).toEqual([[first?.[0]?.key, [{ id: '0' }]]]);
    expect(second?.map((c) => [c.key, c.parts])).toEqual([[first?.[0]?.key, [{ id: '1' }]]]);
    const server = await carriedOn(dir.join('server'));
    // What lies in an array is there once in each of its members.
    const [array] = server.filter((c) => c.what === 'array lab:pv');
    const [inside] = server.filter((c) => c.what.startsWith('volume group'));
    expect(bare(inside?.parts[0]?.within)).toBe(array?.key.replace('md ', ''));
    expect(server.map((c) => c.what)).toEqual(
      expect.arrayContaining(['array lab:boot', 'array lab:pv']),
    );
    expect(server.find((c) => c.what === 'array lab:boot')).toMatchObject({
      key: 'md 15b67e858acc6833de34d969f073789e',
      name: 'boot',
    });
    expect(await carriedOn(dir.join('r1-090'))).toEqual([
      expect.objectContaining({ key: 'md 79ef3e4d44b7046eddf9533950ab75f9' }),
    ]);
    // An array of which this is all there is has nothing in common with anybody.
    expect(await carriedOn(dir.join('r0-one'))).toEqual([]);
  });

  it('knows a btrfs of two devices, and takes no notice of what lies on one', async () => {
    const files = ['x', 'y', 'z'].map((name) => sparseFile(dir, `btrfs-${name}`, 128 * MIB));
    const [x = '', y = '', z = ''] = files;
    await runTool('mkfs.btrfs', '-q', '-f', '-L', 'big data', x, y);
    const [first] = await carriedOn(x);
    expect(first?.parts).toEqual([{ id: '1' }]);
    expect(await carriedOn(y)).toEqual([{ ...first, parts: [{ id: '2' }] }]);
    expect(first).toMatchObject({ what: 'btrfs big data', name: 'big_data' });
    await runTool('mkfs.btrfs', '-q', '-f', '-L', 'big data', z);
    expect(await carriedOn(z)).toEqual([]);
    await runTool('mkfs.ext4', '-q', '-F', z);
    expect(await carriedOn(z)).toEqual([]);
  });

  it('rejects for a device that is not there', async () => {
    await expect(carriedOn(dir.join('none'))).rejects.toThrow('none');
  });
});
